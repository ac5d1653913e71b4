"""The parts of a calibration: one pass over the data, ranks merged in order, statistics written."""
