"""What tests share: toy networks, small datasets, killed runs, a loopback Hub."""
