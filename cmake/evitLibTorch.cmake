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

function(evit_find_libtorch error)
  set(${error} "" PARENT_SCOPE)
  if(TARGET evit::libtorch)
    return()
  endif()
  if(TARGET torch AND TORCH_LIBRARIES)
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
  foreach(part MAJOR MINOR PATCH)
    file(STRINGS "${version_header}" line REGEX "^#define TORCH_VERSION_${part} [0-9]+")
    string(REGEX MATCH "[0-9]+$" ${part} "${line}")
  endforeach()
  set(version ${MAJOR}.${MINOR}.${PATCH})
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
