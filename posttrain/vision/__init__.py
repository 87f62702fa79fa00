"""Pure functions on images, models, label noise and data sets: tensors and tables in and out."""
