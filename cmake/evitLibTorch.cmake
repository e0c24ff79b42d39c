# Finds LibTorch for the build and, installed beside evitConfig.cmake, for those who link libevit.
#
# Not find_package(Torch): where torch was built with CUDA, its package insists on a CUDA toolkit of the same version,
# which neither libevit nor a program that runs an exported model needs. Of LibTorch, they need headers and libraries.
# Whoever needs more calls find_package(Torch) first; then that is what is used.
#
# evit_find_libtorch(<error>) looks for torch's folder, which has include/ and lib/, in this order
#
#   EVIT_TORCH_ROOT                    the folder itself
#   Torch_DIR, CMAKE_PREFIX_PATH       as for find_package(Torch)
#   Python3_EXECUTABLE, or python3     the torch that it would import
#
# and sets EVIT_TORCH_ROOT in the cache and the target evit::libtorch; or <error>, to what is wrong.

# Sets <version> to that of the torch in a folder, by its headers; to nothing where they do not say it.
function(evit_torch_version root version)
  set(found "")
  foreach(header headeronly/version.h csrc/api/include/torch/version.h)  # the second is that of older ones
    if(NOT found AND EXISTS "${root}/include/torch/${header}")
      foreach(part MAJOR MINOR PATCH)
        file(STRINGS "${root}/include/torch/${header}" line REGEX "^#define TORCH_VERSION_${part} [0-9]+")
        if(line MATCHES "([0-9]+)$")
          list(APPEND found ${CMAKE_MATCH_1})
        endif()
      endforeach()
    endif()
  endforeach()
  list(JOIN found "." found)
  set(${version} "${found}" PARENT_SCOPE)
endfunction()

function(evit_find_libtorch error)
  set(${error} "" PARENT_SCOPE)
  if(TARGET evit::libtorch)
    return()
  endif()
  if(TARGET torch AND TORCH_LIBRARIES)
    set(version "")
    if(TORCH_INSTALL_PREFIX)
      evit_torch_version("${TORCH_INSTALL_PREFIX}" version)
    endif()
    if(NOT version)
      set(version "${Torch_VERSION}")
    endif()
    if(NOT version)
      # As of a torch that is built in the same project.
      message(STATUS "torch: found before, its version is not known; evit needs 2.10 or newer")
    elseif(version VERSION_LESS 2.10)
      set(${error} "Expected torch 2.10 or newer, but find_package(Torch) found ${version} in \
${TORCH_INSTALL_PREFIX} before. Let it find a newer one, by Torch_DIR or CMAKE_PREFIX_PATH." PARENT_SCOPE)
      return()
    else()
      message(STATUS "torch: ${TORCH_INSTALL_PREFIX} (${version}), found before")
    endif()
    add_library(evit::libtorch INTERFACE IMPORTED)
    set_target_properties(evit::libtorch PROPERTIES INTERFACE_LINK_LIBRARIES "${TORCH_LIBRARIES}")
    set(EVIT_TORCH_ROOT "${TORCH_INSTALL_PREFIX}" CACHE PATH "torch's folder, with include/ and lib/" FORCE)
    return()
  endif()

  set(root "${EVIT_TORCH_ROOT}")
  if(NOT root)
    string(REPLACE ":" ";" from_environment "$ENV{CMAKE_PREFIX_PATH}")
    foreach(folder "${Torch_DIR}" ${CMAKE_PREFIX_PATH} ${from_environment})
      # The package's folder, torch.utils.cmake_prefix_path, or torch's folder.
      foreach(package "" /Torch /share/cmake/Torch)
        if(NOT root AND folder AND EXISTS "${folder}${package}/TorchConfig.cmake")
          get_filename_component(root "${folder}${package}/../../.." ABSOLUTE)
        endif()
      endforeach()
    endforeach()
  endif()
  if(NOT root)
    set(python "${Python3_EXECUTABLE}")
    if(NOT python)
      # Under a name of its own: a later find_package(Python3) should find what it would have found.
      find_program(EVIT_PYTHON3 python3)
      mark_as_advanced(EVIT_PYTHON3)
      set(python "${EVIT_PYTHON3}")
    endif()
    if(python)
      # Found without importing it, which takes seconds.
      execute_process(
        COMMAND ${python} -c
                "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
        OUTPUT_VARIABLE root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    endif()
  endif()

  if(NOT root)
    set(${error} "LibTorch was not found: set EVIT_TORCH_ROOT to torch's folder, which has include/ and lib/, or have \
a python3 with torch on PATH." PARENT_SCOPE)
    return()
  endif()
  set(version_header "${root}/include/torch/headeronly/version.h")
  if(NOT EXISTS "${root}/lib/libtorch_cpu.so" OR NOT EXISTS "${version_header}")
    set(${error} "Expected torch 2.10 or newer in ${root}, with lib/libtorch_cpu.so and \
include/torch/headeronly/version.h; they are not there. EVIT_TORCH_ROOT says where torch is." PARENT_SCOPE)
    return()
  endif()
  evit_torch_version("${root}" version)
  if(version VERSION_LESS 2.10)
    set(${error} "Expected torch 2.10 or newer, found ${version} in ${root}." PARENT_SCOPE)
    return()
  endif()
  message(STATUS "torch: ${root} (${version})")
  set(EVIT_TORCH_ROOT "${root}" CACHE PATH "torch's folder, with include/ and lib/" FORCE)

  set(libraries "")
  foreach(name torch torch_cpu c10 torch_cuda c10_cuda)
    if(EXISTS "${root}/lib/lib${name}.so")
      list(APPEND libraries "${root}/lib/lib${name}.so")
    endif()
  endforeach()
  # No program names a symbol of these two, and linkers that are told --as-needed would leave them out. Packages of
  # AOTInductor need the first, which they do not find themselves; the other registers torch's CUDA kernels.
  set(options "")
  foreach(name torch torch_cuda)
    if(EXISTS "${root}/lib/lib${name}.so")
      list(APPEND options "LINKER:--push-state,--no-as-needed,${root}/lib/lib${name}.so,--pop-state")
    endif()
  endforeach()
  add_library(evit::libtorch INTERFACE IMPORTED)
  set_target_properties(
    evit::libtorch
    PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${root}/include;${root}/include/torch/csrc/api/include"
               INTERFACE_COMPILE_FEATURES cxx_std_20
               INTERFACE_LINK_LIBRARIES "${libraries}"
               INTERFACE_LINK_OPTIONS "${options}")
endfunction()
