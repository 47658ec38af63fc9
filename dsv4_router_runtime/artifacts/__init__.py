"""The artifact contract: the manifest's schema, the folder that holds a set, the choice of kernels.

Pure: needs neither CUDA nor torch.
"""
