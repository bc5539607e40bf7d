// The kernels that find the largest logit beside the statistics: files of their own for the time
// that they take to compile.
#include "redline/kernels/cuda/cross_entropy/promised_kernel.cuh"
#include "redline/kernels/cuda/cross_entropy/statistics_kernel.cuh"

namespace redline::cuda {

void run_with_predictions(const CrossEntropyStatistics& args, Stream stream) {
  launch_statistics<true>(args, stream);
}

void run_with_predictions(const CrossEntropyPromise& args, int cluster, Stream stream) {
  launch_promises<true>(args, cluster, stream);
}

}  // namespace redline::cuda
