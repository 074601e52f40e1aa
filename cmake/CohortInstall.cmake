# SPDX-License-Identifier: Apache-2.0
# cmake --install: headers, the package for find_package(cohort CONFIG [COMPONENTS mpi cuda torch]), and
# pkg-config files.

include(CMakePackageConfigHelpers)
set(cohort_config_dir "${CMAKE_INSTALL_LIBDIR}/cmake/cohort")

install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/cohort" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
        FILES_MATCHING PATTERN "*.hpp" PATTERN "*.cuh")

install(FILES "${PROJECT_SOURCE_DIR}/LICENSE" DESTINATION "${CMAKE_INSTALL_DOCDIR}")

# One export set for each component, so that a consumer without MPI or CUDA never looks for them.
function(cohort_install_target target component)
  if(TARGET ${target})
    install(TARGETS ${target} EXPORT ${component} ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}")
    install(EXPORT ${component} NAMESPACE cohort:: DESTINATION "${cohort_config_dir}"
            FILE "${component}Targets.cmake")
  endif()
endfunction()
cohort_install_target(cohort cohort)
cohort_install_target(cohort_mpi cohort_mpi)
cohort_install_target(cohort_cuda cohort_cuda)
cohort_install_target(cohort_torch cohort_torch)

# What the package remembers: the folder with the NCCL that the library was built with.
set(cohort_nccl_root "")
if(TARGET cohort_cuda AND NCCL_INCLUDE_DIR)
  cmake_path(GET NCCL_INCLUDE_DIR PARENT_PATH cohort_nccl_root)
endif()

configure_package_config_file(
  "${PROJECT_SOURCE_DIR}/cmake/cohortConfig.cmake.in" "${PROJECT_BINARY_DIR}/cohortConfig.cmake"
  INSTALL_DESTINATION "${cohort_config_dir}" NO_SET_AND_CHECK_MACRO)
# Before 1.0 a minor version may change interfaces.
write_basic_package_version_file(
  "${PROJECT_BINARY_DIR}/cohortConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/cohortConfig.cmake"
              "${PROJECT_BINARY_DIR}/cohortConfigVersion.cmake"
              "${PROJECT_SOURCE_DIR}/cmake/FindNCCL.cmake"
              "${PROJECT_SOURCE_DIR}/cmake/FindTorchLibraries.cmake" DESTINATION "${cohort_config_dir}")

# The prefix is where the file lies, so an installed tree can be moved.
function(cohort_install_pkg_config name description requires cflags libs)
  cmake_path(RELATIVE_PATH CMAKE_INSTALL_FULL_INCLUDEDIR BASE_DIRECTORY "${CMAKE_INSTALL_PREFIX}"
             OUTPUT_VARIABLE include_dir)
  cmake_path(RELATIVE_PATH CMAKE_INSTALL_FULL_LIBDIR BASE_DIRECTORY "${CMAKE_INSTALL_PREFIX}"
             OUTPUT_VARIABLE lib_dir)
  cmake_path(RELATIVE_PATH CMAKE_INSTALL_PREFIX
             BASE_DIRECTORY "${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig" OUTPUT_VARIABLE up)
  configure_file("${PROJECT_SOURCE_DIR}/cmake/cohort.pc.in" "${PROJECT_BINARY_DIR}/${name}.pc" @ONLY)
  install(FILES "${PROJECT_BINARY_DIR}/${name}.pc" DESTINATION "${CMAKE_INSTALL_LIBDIR}/pkgconfig")
endfunction()

set(requires fmt)
set(requires_private "")
set(cflags "-I\${includedir}")
if(COHORT_FMT_HEADER_ONLY)  # fmt's flags, and not its library
  set(requires "")
  set(requires_private fmt)
  string(APPEND cflags " -DFMT_HEADER_ONLY=1")
endif()
cohort_install_pkg_config(cohort "${PROJECT_DESCRIPTION}" "${requires}" "${cflags}" "-pthread")
set(requires_private "")
if(TARGET cohort_mpi)
  # The flags of the MPI that the configuration found; MPI's own pkg-config files have no common name.
  set(cflags "")
  foreach(folder IN LISTS MPI_CXX_INCLUDE_DIRS)
    string(APPEND cflags " -I${folder}")
  endforeach()
  foreach(definition IN LISTS MPI_CXX_COMPILE_DEFINITIONS)
    string(APPEND cflags " -D${definition}")
  endforeach()
  string(REPLACE ";" " " libs "${MPI_CXX_LIBRARIES}")
  cohort_install_pkg_config(cohort-mpi "Cohort over MPI" cohort "${cflags}" "${libs}")
endif()
if(TARGET cohort_cuda)
  # CUDA's runtime and the NCCL that the configuration found; neither has pkg-config files everywhere.
  set(cflags "")
  foreach(folder IN LISTS CUDAToolkit_INCLUDE_DIRS NCCL_INCLUDE_DIR)
    string(APPEND cflags " -I${folder}")
  endforeach()
  string(CONCAT libs "-L\${libdir} -lcohort_cuda -L${CUDAToolkit_LIBRARY_DIR} -lcudart ${NCCL_LIBRARY} "
                "-L${CUDAToolkit_LIBRARY_DIR}/stubs -Wl,--push-state,--as-needed -lcuda -Wl,--pop-state")
  foreach(library IN LISTS CMAKE_DL_LIBS)
    string(APPEND libs " -l${library}")
  endforeach()
  cohort_install_pkg_config(cohort-cuda "Cohort on NVIDIA cards" cohort "${cflags}" "${libs}")
endif()
