"""The other side of the prefix index's benchmark: Dynamo's radix tree, in an environment of its own."""
