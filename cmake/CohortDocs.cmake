# SPDX-License-Identifier: Apache-2.0
# The target docs: the reference as HTML in the build tree, docs/html/index.html, by Doxygen.

configure_file("${PROJECT_SOURCE_DIR}/cmake/Doxyfile.in" "${PROJECT_BINARY_DIR}/Doxyfile" @ONLY)
find_program(COHORT_DOXYGEN doxygen DOC "Doxygen, for the target docs")
mark_as_advanced(COHORT_DOXYGEN)
if(COHORT_DOXYGEN)
  add_custom_target(
    docs
    COMMAND "${COHORT_DOXYGEN}" "${PROJECT_BINARY_DIR}/Doxyfile"
    COMMAND "${CMAKE_COMMAND}" -E echo "${PROJECT_BINARY_DIR}/docs/html/index.html"
    VERBATIM)
else()
  add_custom_target(
    docs
    COMMAND "${CMAKE_COMMAND}" -E echo "docs: doxygen is not installed"
    COMMAND "${CMAKE_COMMAND}" -E false
    VERBATIM)
endif()
