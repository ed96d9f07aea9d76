"""Leaves on tiles that the Triton kernels of every op share. They know no op.

Nothing here is imported by `import attn_ops`: the rooms import it at the first CUDA launch.
"""
