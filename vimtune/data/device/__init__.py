"""The presets of `vimtune.data.transforms` for a whole batch on a device, by operations of torch.

Their random numbers are a function of seed, epoch and image, so that an image is changed in the same way
wherever its pixels come from: decoded once and kept on the device (`vimtune.data.loading.resident`), or cut
out by a process on the host in every epoch (`vimtune.data.loading.cropped`).
"""
