// The kernels that find the largest logit beside the statistics: a file of their own for the time
// that they take to compile.
#include "redline/kernels/cuda/cross_entropy/statistics_kernel.cuh"

namespace redline::cuda {

void run_with_predictions(const CrossEntropyStatistics& args, Stream stream) {
  launch_statistics<true>(args, stream);
}

}  // namespace redline::cuda
