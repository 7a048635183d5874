"""Teaching a bundle what people have seen since: defects that passed, good parts that were rejected. Without PyTorch."""
