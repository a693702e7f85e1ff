"""Two-layer ReLU networks by convex programs: Pilanci & Ergen (arXiv 2002.10553), Bai et al. (arXiv 2201.01965).

`program` holds the objectives and the network, `patterns` the activation patterns, `cones` the exact program, `admm`
and `sampled` the cheaper ones, `fit` the way from samples to a network and what is known of it.
"""
