# The compiled extension of csrc/. Importing it registers the operators torch.ops.inferneo.*; it holds no names.
