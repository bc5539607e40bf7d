# What Python loads: the ops, with their derivatives and registrations. No Python binding inside.
list(TRANSFORM REDLINE_OPS PREPEND redline/ops/ OUTPUT_VARIABLE REDLINE_OP_SOURCES)
list(TRANSFORM REDLINE_OP_SOURCES APPEND .cpp)
# These have no kernels of their own: they stand on torch's, or on other ops'.
list(
  APPEND
  REDLINE_OP_SOURCES
  redline/ops/attention.cpp
  redline/ops/fused_linear_cross_entropy.cpp
  redline/ops/gemm.cpp
  redline/ops/gemm_uneven.cpp
  redline/ops/linear.cpp
  redline/ops/norm_linear.cpp
  redline/ops/norm_mlp.cpp)

add_library(
  redline_ops SHARED
  ${REDLINE_OP_SOURCES}
  redline/ops/activation_part.cpp
  redline/ops/adamw_optimizer.cpp
  redline/ops/attention_plain.cpp
  redline/ops/cross_entropy_inner.cpp
  redline/ops/cross_entropy_promise.cpp
  redline/ops/empty.cpp
  redline/ops/fused_linear_cross_entropy_chunks.cpp
  redline/ops/library.cpp
  redline/ops/log.cpp
  redline/ops/norm_inner.cpp
  redline/ops/norm_part.cpp
  redline/ops/norm_run.cpp
  redline/ops/philox.cpp
  redline/ops/recorder.cpp
  redline/ops/rotary_run.cpp
  redline/ops/run.cpp
  redline/ops/strict.cpp
  redline/ops/watch.cpp)
target_link_libraries(redline_ops PUBLIC redline_core torch_wheel PRIVATE redline_kernels)
target_compile_definitions(redline_ops PRIVATE REDLINE_WITH_CUDA=$<BOOL:${REDLINE_OPS_CUDA}>
                                               REDLINE_VERSION="${REDLINE_VERSION}")
# Torch's headers cost g++ 20 s: they are compiled once.
target_precompile_headers(redline_ops PRIVATE redline/ops/torch.h)
# at::parallel_for is a template over OpenMP: without the flag it runs on one thread. The runtime is
# the libgomp that torch has already loaded.
target_compile_options(redline_ops PRIVATE -g0 -fopenmp)
target_link_options(redline_ops PRIVATE -fopenmp)
# A wheel is built beside the tree's own library, perhaps for another torch: it gets its own copy.
if(NOT SKBUILD)
  set_target_properties(redline_ops PROPERTIES LIBRARY_OUTPUT_DIRECTORY
                                               ${PROJECT_SOURCE_DIR}/python/redline/lib)
endif()
install(TARGETS redline_ops LIBRARY DESTINATION redline/lib COMPONENT python)
