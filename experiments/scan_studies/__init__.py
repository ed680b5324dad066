"""Studies of scan routes, run by `experiments.mhs_vm_routes`."""
