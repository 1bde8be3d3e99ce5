"""Weights in the layouts of Hugging Face transformers and timm: recognised, and converted to our names and back.

Notable:
- The names of its entries show which layout a file has, so it may be called anything and lie anywhere.
- Both libraries compute the rotary periods, fix the bias of the keys to zero, and know neither bias masks nor the norm
  for local crops; timm has no mask token. What they have no place for travels in the metadata of the safetensors file,
  so that converting there and back changes no bit.
- Tensors are shared with the input wherever only their names change. Of a ViT in Hugging Face's layout, queries, keys
  and values are joined, which copies them; in the other direction they are views.
"""
