"""Records of other data sets' formats (`swim-fast data import`): masks, names and conversations to NL-Refer."""
