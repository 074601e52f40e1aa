# SPDX-License-Identifier: Apache-2.0
# The environment in which the project's scripts and tests start mpirun: as root, with fewer cores
# than ranks, in a container. Sourced by shell scripts and read line by line by CMake, so each line
# is one plain assignment. Open MPI 4 reads OMPI_, Open MPI 5 PRTE_.
export OMPI_ALLOW_RUN_AS_ROOT=1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export PRTE_ALLOW_RUN_AS_ROOT=1
export PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
# More ranks than cores: allowed, not bound to cores, and a waiting rank lets the others run.
export OMPI_MCA_rmaps_base_oversubscribe=1
export OMPI_MCA_hwloc_base_binding_policy=none
export OMPI_MCA_mpi_yield_when_idle=1
export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
export PRTE_MCA_hwloc_default_binding_policy=none
# Containers forbid process_vm_readv, and the attempt prints a warning for every rank.
export OMPI_MCA_btl_vader_single_copy_mechanism=none
export OMPI_MCA_btl_base_warn_component_unused=0
