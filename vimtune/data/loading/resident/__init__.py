"""Data sets whose decoded images live on the device, and are cropped, changed and normalised there.

A data set is decoded once, by the workers, and packed into one buffer of 8-bit pixels (`store`). From then on
a batch is a matter of a few operations on the device: `draws` computes the random numbers of its images,
`crops` cuts and resizes them, `operations` changes colours and shapes, `augmentation` puts these
together as the presets, and `loader` yields the batches. No step loops over images, and none waits for
the device.
"""
