# SPDX-License-Identifier: Apache-2.0
# Finds NCCL: NCCL::NCCL, NCCL_VERSION (read from nccl.h), NCCL_INCLUDE_DIR, NCCL_LIBRARY.
#
# Under NCCL_ROOT (variable or environment), where it is set, and nowhere else then; otherwise in the
# CUDA toolkit, /usr/local and /usr. Wheels and run-time packages carry only libnccl.so.2, which is as
# good to link with. Header and library come from one folder: of two installations, each gives one of
# its halves to nobody. Where the library tells its version, it is compared with the header's. A
# target NCCL::NCCL that exists already is taken as it is.

set(NCCL_MISMATCH "")
if(TARGET NCCL::NCCL AND NOT nccl_target_is_ours)
  get_target_property(nccl_folders NCCL::NCCL INTERFACE_INCLUDE_DIRECTORIES)
  string(REGEX REPLACE "\\$<BUILD_INTERFACE:([^>]*)>" "\\1" nccl_folders "${nccl_folders}")
  unset(NCCL_INCLUDE_DIR CACHE)
  find_path(NCCL_INCLUDE_DIR NAMES nccl.h PATHS ${nccl_folders} NO_DEFAULT_PATH)
  set(NCCL_LIBRARY NCCL::NCCL)
else()
  set(nccl_target_is_ours ON)
  set(nccl_roots ${NCCL_ROOT} $ENV{NCCL_ROOT})
  if(nccl_roots)
    set(nccl_only NO_DEFAULT_PATH)
  else()
    set(nccl_only "")
    set(nccl_roots ${CUDAToolkit_LIBRARY_ROOT} ${CUDAToolkit_TARGET_DIR} ${CUDAToolkit_BIN_DIR}/.. /usr/local /usr)
  endif()
  # Another NCCL_ROOT than the one of the last configuration: what was found is not what is wanted.
  if(NOT "${NCCL_FOUND_UNDER}" STREQUAL "${nccl_roots}")
    unset(NCCL_INCLUDE_DIR CACHE)
    unset(NCCL_LIBRARY CACHE)
  endif()
  set(NCCL_FOUND_UNDER "${nccl_roots}" CACHE INTERNAL "Where NCCL was looked for")

  find_path(NCCL_INCLUDE_DIR NAMES nccl.h HINTS ${nccl_roots} PATH_SUFFIXES include ${nccl_only})
  # The library of the folder that the header is in, by either name, before that of any other.
  if(NCCL_INCLUDE_DIR)
    cmake_path(GET NCCL_INCLUDE_DIR PARENT_PATH nccl_prefix)
  endif()
  find_library(
    NCCL_LIBRARY
    NAMES nccl libnccl.so.2 NAMES_PER_DIR
    HINTS ${nccl_prefix} ${nccl_roots}
    PATH_SUFFIXES lib lib64 lib/${CMAKE_LIBRARY_ARCHITECTURE} lib/x86_64-linux-gnu lib/aarch64-linux-gnu
    ${nccl_only})
endif()
mark_as_advanced(NCCL_INCLUDE_DIR NCCL_LIBRARY)

if(NCCL_INCLUDE_DIR)
  foreach(part MAJOR MINOR PATCH)
    file(STRINGS "${NCCL_INCLUDE_DIR}/nccl.h" line REGEX "^#define NCCL_${part} +[0-9]+" LIMIT_COUNT 1)
    string(REGEX REPLACE ".*NCCL_${part} +([0-9]+).*" "\\1" nccl_${part} "${line}")
  endforeach()
  set(NCCL_VERSION "${nccl_MAJOR}.${nccl_MINOR}.${nccl_PATCH}")
endif()

# The library's own version, from its banner "NCCL version 2.28.9+cuda13.0".
if(NCCL_VERSION AND EXISTS "${NCCL_LIBRARY}" AND NOT IS_DIRECTORY "${NCCL_LIBRARY}")
  if(NOT "${NCCL_LIBRARY};${NCCL_VERSION}" STREQUAL "${NCCL_COMPARED}")
    file(STRINGS "${NCCL_LIBRARY}" nccl_banner REGEX "NCCL version [0-9]+\\.[0-9]+\\.[0-9]+" LIMIT_COUNT 1)
    if(nccl_banner MATCHES "NCCL version ([0-9]+\\.[0-9]+\\.[0-9]+)")
      set(nccl_library_version "${CMAKE_MATCH_1}")
    else()
      set(nccl_library_version "")
    endif()
    set(NCCL_LIBRARY_VERSION "${nccl_library_version}" CACHE INTERNAL "Version of NCCL_LIBRARY")
    set(NCCL_COMPARED "${NCCL_LIBRARY};${NCCL_VERSION}" CACHE INTERNAL "What NCCL_LIBRARY_VERSION is of")
  endif()
  if(NCCL_LIBRARY_VERSION AND NOT NCCL_LIBRARY_VERSION VERSION_EQUAL NCCL_VERSION)
    set(NCCL_MISMATCH
        "the header is that of NCCL ${NCCL_VERSION} (${NCCL_INCLUDE_DIR}/nccl.h) and the library that of ${NCCL_LIBRARY_VERSION} (${NCCL_LIBRARY})")
  endif()
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  NCCL
  REQUIRED_VARS NCCL_LIBRARY NCCL_INCLUDE_DIR
  VERSION_VAR NCCL_VERSION
  REASON_FAILURE_MESSAGE "${NCCL_MISMATCH}")
if(NCCL_MISMATCH)
  set(NCCL_FOUND FALSE)
  if(NCCL_FIND_REQUIRED)
    message(FATAL_ERROR "NCCL: ${NCCL_MISMATCH}; NCCL_ROOT names the folder of one")
  endif()
endif()

if(NCCL_FOUND AND NOT TARGET NCCL::NCCL)
  add_library(NCCL::NCCL UNKNOWN IMPORTED)
  set_target_properties(NCCL::NCCL PROPERTIES IMPORTED_LOCATION "${NCCL_LIBRARY}"
                                              INTERFACE_INCLUDE_DIRECTORIES "${NCCL_INCLUDE_DIR}")
endif()
