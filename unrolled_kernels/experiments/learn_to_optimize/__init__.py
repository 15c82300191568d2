"""Learning to optimize (paper, Sec. 7.1, "RNN"): Q* and b are given, only the algorithm is learned; Figure 6."""
