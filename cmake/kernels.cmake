# core and kernels: arithmetic on memory. No torch directory is on these include paths.
add_library(redline_core INTERFACE)
target_include_directories(redline_core INTERFACE ${PROJECT_SOURCE_DIR})
target_compile_options(redline_core
                       INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Werror;-Wno-psabi>)

# One file per op, alphabetical: redline/kernels/<op>.cpp and redline/kernels/cpu/<op>.cpp.
set(REDLINE_OPS
    activation
    adamw
    bias_dropout_add
    cross_entropy
    embedding
    gated_activation
    gradient_norm
    norm
    rotary
    softmax)
list(TRANSFORM REDLINE_OPS PREPEND redline/kernels/ OUTPUT_VARIABLE REDLINE_KERNEL_SOURCES)
list(TRANSFORM REDLINE_KERNEL_SOURCES APPEND .cpp)
list(TRANSFORM REDLINE_OPS PREPEND redline/kernels/cpu/ OUTPUT_VARIABLE REDLINE_CPU_SOURCES)
list(TRANSFORM REDLINE_CPU_SOURCES APPEND .cpp)

# gemm has no CPU kernel: a rung missing on purpose.
add_library(redline_kernels STATIC ${REDLINE_KERNEL_SOURCES} redline/kernels/cpu/isa.cpp
                                   redline/kernels/gemm.cpp)
target_link_libraries(redline_kernels PUBLIC redline_core)

# One object library per instruction set, all from the same sources. A host that is not x86 builds
# the same code three times: the table keeps its three rows, and one of them is chosen.
function(add_cpu_kernels isa)
  add_library(cpu_${isa} OBJECT ${REDLINE_CPU_SOURCES})
  target_link_libraries(cpu_${isa} PRIVATE redline_core)
  target_compile_definitions(cpu_${isa} PRIVATE REDLINE_ISA=${isa})
  # Contraction to fused multiply-add is part of the arithmetic: errno and traps are not.
  target_compile_options(cpu_${isa} PRIVATE -O3 -ffp-contract=fast -fno-math-errno
                                            -fno-trapping-math)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    target_compile_options(cpu_${isa} PRIVATE ${ARGN})
  endif()
  target_sources(redline_kernels PRIVATE $<TARGET_OBJECTS:cpu_${isa}>)
endfunction()
add_cpu_kernels(baseline)
add_cpu_kernels(avx2 -mavx2 -mfma -mf16c)
add_cpu_kernels(
  avx512
  -mavx512f
  -mavx512bw
  -mavx512vl
  -mavx512dq
  -mfma
  -mf16c
  -mprefer-vector-width=512
  -Wno-maybe-uninitialized) # g++ 12 warns inside its own avx512fintrin.h

if(REDLINE_WITH_CUDA)
  # One file per op, or a folder of that name where one file outgrew 400 lines; sum_chunks is a
  # launch that several end with, capability asks what the code here was made for.
  set(REDLINE_CUDA_SOURCES
      activation
      adamw
      bias_dropout_add
      capability
      cross_entropy/gradient
      cross_entropy/loss
      cross_entropy/predictions
      cross_entropy/promised
      cross_entropy/promised_predictions
      embedding/backward
      embedding/forward
      gated_activation/forward
      gradient_norm
      norm/few_rows
      rotary
      softmax/backward
      softmax/forward
      sum_chunks)
  list(TRANSFORM REDLINE_CUDA_SOURCES PREPEND redline/kernels/cuda/)
  list(TRANSFORM REDLINE_CUDA_SOURCES APPEND .cu)
  # Those whose kernels take longest to compile: each once per element type, REDLINE_ELEMENT; the
  # .cpp beside it chooses, norm/forward.cpp for amax_forward.cu too.
  set(REDLINE_CUDA_SOURCES_BY_ELEMENT
      gated_activation/backward
      norm/amax_forward
      norm/backward
      norm/dropout_backward
      norm/dropout_forward
      norm/forward)
  list(TRANSFORM REDLINE_CUDA_SOURCES_BY_ELEMENT PREPEND redline/kernels/cuda/)
  list(TRANSFORM REDLINE_CUDA_SOURCES_BY_ELEMENT APPEND .cpp OUTPUT_VARIABLE REDLINE_CUDA_CHOICES)
  list(REMOVE_ITEM REDLINE_CUDA_CHOICES redline/kernels/cuda/norm/amax_forward.cpp)
  list(TRANSFORM REDLINE_CUDA_SOURCES_BY_ELEMENT APPEND .cu)
  set(REDLINE_CUDA_OPTIONS
      $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings;-lineinfo;--expt-relaxed-constexpr;
      -Xcompiler=-Wno-psabi>)
  foreach(element float bfloat16 float16)
    add_library(cuda_${element} OBJECT ${REDLINE_CUDA_SOURCES_BY_ELEMENT})
    target_link_libraries(cuda_${element} PRIVATE redline_core CUDA::cudart)
    target_compile_definitions(cuda_${element} PRIVATE REDLINE_ELEMENT=${element})
    target_compile_options(cuda_${element} PRIVATE ${REDLINE_CUDA_OPTIONS})
    target_sources(redline_kernels PRIVATE $<TARGET_OBJECTS:cuda_${element}>)
  endforeach()
  target_sources(redline_kernels PRIVATE ${REDLINE_CUDA_SOURCES} ${REDLINE_CUDA_CHOICES}
                                         redline/kernels/cuda/gemm.cpp)
  target_link_libraries(redline_kernels PUBLIC CUDA::cudart cublas_lt)
  target_compile_options(redline_kernels PRIVATE ${REDLINE_CUDA_OPTIONS})
endif()
