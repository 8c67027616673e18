"""The pass from SRC to DST: the public functions, and the steps they consist of."""
