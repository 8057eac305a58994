"""What a stage minimises: the contract and the objectives that come with the library."""
