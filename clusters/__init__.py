"""Files of `ray up`, KubeRay and Slurm, and the node provider for plain SSH hosts; see docs/cluster.md."""
