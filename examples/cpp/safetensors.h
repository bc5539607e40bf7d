// The safetensors format: eight bytes of header length, a JSON header, the tensors' bytes. What
// Python's package writes this reads, and the reverse.
#pragma once

#include <map>
#include <string>

#include "redline/layers/module.h"

namespace safetensors {

struct File {
  std::map<std::string, torch::Tensor> tensors;
  std::map<std::string, std::string> metadata;
};

// Writes aside, flushes to the disk, then renames: the file is whole or as it was. Throws
// std::runtime_error with the path and the system's reason.
void save(const std::string& path, const File& file);

// Tensors on the CPU. Throws std::runtime_error with the path and what is wrong with it: a length
// that the file does not have, a header that is not the format's, bytes missing or left over.
File load(const std::string& path);

}  // namespace safetensors
