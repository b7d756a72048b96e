"""The work of image classification: data and model, mixing, scores, report and pictures."""
