# The C++ API: torch::nn modules and the two addresses, and the programs that use them.
add_library(
  redline SHARED
  redline/extensions/transformer_engine.cpp
  redline/layers/attention.cpp
  redline/layers/embedding.cpp
  redline/layers/gpt.cpp
  redline/layers/linear.cpp
  redline/layers/mlp.cpp
  redline/layers/norm.cpp
  redline/layers/recompute.cpp
  redline/layers/rotary.cpp
  redline/layers/transformer_layer.cpp
  redline/layers/weight_gradient.cpp)
target_link_libraries(redline PUBLIC redline_ops)
target_compile_options(redline PRIVATE -g0)
# torch/torch.h costs g++ 28 s: it is compiled once, and the programs below use the same.
set_target_properties(redline PROPERTIES DEFINE_SYMBOL "")
target_precompile_headers(redline PRIVATE redline/layers/module.h)

function(add_cpp_program name)
  add_executable(${name} ${ARGN})
  target_link_libraries(${name} PRIVATE redline)
  target_compile_options(${name} PRIVATE -g0 -fPIC)
  set_target_properties(${name} PROPERTIES POSITION_INDEPENDENT_CODE OFF)
  target_precompile_headers(${name} REUSE_FROM redline)
endfunction()

add_cpp_program(train_gpt examples/cpp/json.cpp examples/cpp/safetensors.cpp
                examples/cpp/train_gpt.cpp)
add_cpp_program(layer_outputs examples/cpp/json.cpp examples/cpp/safetensors.cpp
                tests/cpp/layer_outputs.cpp)
