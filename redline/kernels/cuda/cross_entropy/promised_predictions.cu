// The kernels that find the largest logit in one pass with statistics and gradient: a file of their
// own, as predictions.cu.
#include "redline/kernels/cuda/cross_entropy/promised_kernel.cuh"

namespace redline::cuda {

void run_with_predictions(const CrossEntropyPromise& args, int cluster, Stream stream) {
  launch_promises<true>(args, cluster, stream);
}

}  // namespace redline::cuda
