# Torch's headers and libraries, by asking the interpreter that will load the library.
# find_package(Torch) of a CUDA wheel demands a toolkit; a machine without one must build too.
find_package(Python 3.10 COMPONENTS Interpreter REQUIRED)
execute_process(
  COMMAND ${Python_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/torch_paths.py
  OUTPUT_VARIABLE torch_paths
  RESULT_VARIABLE failed
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(failed)
  message(FATAL_ERROR "redline: torch: ${Python_EXECUTABLE} cannot import torch 2.11 or newer")
endif()
list(GET torch_paths 0 TORCH_VERSION)
list(GET torch_paths 1 TORCH_LIBRARY_DIR)
list(GET torch_paths 2 TORCH_CXX11_ABI)
list(GET torch_paths 3 TORCH_HAS_CUDA)
list(
  SUBLIST
  torch_paths
  4
  -1
  TORCH_INCLUDE_DIRS)
message(STATUS "redline: torch ${TORCH_VERSION} from ${Python_EXECUTABLE}")

if(REDLINE_WITH_CUDA AND NOT TORCH_HAS_CUDA)
  message(STATUS "redline: this torch has no CUDA: the ops are built for the CPU alone")
  set(REDLINE_OPS_CUDA OFF)
else()
  set(REDLINE_OPS_CUDA ${REDLINE_WITH_CUDA})
endif()

add_library(torch_wheel INTERFACE)
target_include_directories(torch_wheel SYSTEM INTERFACE ${TORCH_INCLUDE_DIRS})
target_compile_definitions(torch_wheel INTERFACE _GLIBCXX_USE_CXX11_ABI=${TORCH_CXX11_ABI})
target_link_directories(torch_wheel INTERFACE ${TORCH_LIBRARY_DIR})
target_link_libraries(torch_wheel INTERFACE torch torch_cpu c10)
if(REDLINE_OPS_CUDA)
  target_link_libraries(torch_wheel INTERFACE c10_cuda CUDA::cudart)
endif()
