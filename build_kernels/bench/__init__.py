"""Time the router on this machine's GPU beside its peers; every answer is checked first.

    measure     the loop over shapes, modes, N and contenders: check, then time
    inputs      weights, bias and hidden states of one shape
    contenders  this project's kernels and torch; peers: other projects' staged kernels
    options     for --options: this project's with a server's options on, and for a hash layer
    behind      for --behind: every contender in a chain after an RMSNorm
    check       compare a contender's answer with the router's
    stopwatch   CUDA graphs, events and the host's clock
    floors      an empty kernel and a streaming read of the weights
    report      the figures, their ratios, and the JSON file that holds them
    model       sm_100a on paper, from sm_90a's figures
    table, plot the figures as text and as a picture

Importing the command, or drawing a stored report, needs neither a GPU nor torch. Importing this
package imports nothing, so that `__main__` can name a missing package.
"""
