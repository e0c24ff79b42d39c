# What `cmake --install` puts where: docs/cpp.md has how it is used. Nothing of it names a folder of this machine, so
# that the prefix can be moved.
include(CMakePackageConfigHelpers)
set(package_folder ${CMAKE_INSTALL_LIBDIR}/cmake/evit)
set(components "")

function(install_component name target)
  install(TARGETS ${target} EXPORT evit-${name} LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
                                                ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
  install(EXPORT evit-${name} FILE evit-${name}-targets.cmake NAMESPACE evit:: DESTINATION ${package_folder})
  set(components ${components} ${name} PARENT_SCOPE)
endfunction()

if(EVIT_LIBRARY)
  install_component(operators evit)
  install(FILES cmake/evitLibTorch.cmake DESTINATION ${package_folder})
endif()

# The kernels know neither torch nor Python: they are of use to plugins of other runtimes as they are.
set_target_properties(evit_kernels PROPERTIES EXPORT_NAME kernels)
install_component(kernels evit_kernels)
file(GLOB headers CONFIGURE_DEPENDS csrc/evit/*.h)
install(FILES ${headers} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/evit)

list(JOIN components "|" evit_components_regex)
list(JOIN components ", " evit_components_text)
configure_package_config_file(cmake/evitConfig.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/evitConfig.cmake
                              INSTALL_DESTINATION ${package_folder} NO_SET_AND_CHECK_MACRO
                              NO_CHECK_REQUIRED_COMPONENTS_MACRO)
# Before 1.0, what a program is compiled against may change with the second number.
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/evitConfigVersion.cmake
                                 COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/evitConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/evitConfigVersion.cmake
        DESTINATION ${package_folder})
