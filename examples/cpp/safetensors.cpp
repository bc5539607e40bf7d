#include "safetensors.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <stdexcept>

#include "json.h"

namespace safetensors {
namespace {

const std::map<std::string, torch::ScalarType> dtypes = {
    {"BF16", torch::kBFloat16}, {"F16", torch::kFloat16}, {"F32", torch::kFloat32},
    {"F64", torch::kFloat64},   {"I64", torch::kInt64},   {"U8", torch::kUInt8}};

constexpr uint64_t length_bytes = 8;

const std::string& name_of(torch::ScalarType dtype) {
  for (const auto& [name, value] : dtypes)
    if (value == dtype) return name;
  throw std::runtime_error(std::string("no safetensors dtype for ") + c10::toString(dtype));
}

void append(std::string& list, const std::string& item) {
  if (!list.empty()) list += ',';
  list += item;
}

// The entry of a tensor whose bytes start at `offset`.
std::string entry_of(const torch::Tensor& tensor, uint64_t offset) {
  std::string sizes;
  for (const int64_t size : tensor.sizes()) append(sizes, std::to_string(size));
  return "{\"dtype\":\"" + name_of(tensor.scalar_type()) + "\",\"shape\":[" + sizes +
         "],\"data_offsets\":[" + std::to_string(offset) + ',' +
         std::to_string(offset + tensor.nbytes()) + "]}";
}

std::string header_of(const File& file) {
  std::string words;
  for (const auto& [key, value] : file.metadata)
    append(words, json::quote(key) + ':' + json::quote(value));
  std::string entries = "\"__metadata__\":{" + words + '}';
  uint64_t offset = 0;
  for (const auto& [name, tensor] : file.tensors) {
    append(entries, json::quote(name) + ':' + entry_of(tensor, offset));
    offset += tensor.nbytes();
  }
  std::string header = '{' + entries + '}';
  header.resize((header.size() + length_bytes - 1) / length_bytes * length_bytes, ' ');
  return header;
}

// A file that is removed unless it was renamed to its place.
class Aside {
 public:
  explicit Aside(const std::string& path) : path_(path), aside_(path + ".part") {
    descriptor_ = ::open(aside_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (descriptor_ < 0) fail();
  }
  Aside(const Aside&) = delete;
  Aside& operator=(const Aside&) = delete;
  ~Aside() {
    if (descriptor_ >= 0) ::close(descriptor_);
    if (!kept_) ::unlink(aside_.c_str());
  }

  void write(const void* data, uint64_t bytes) {
    const char* at = static_cast<const char*>(data);
    while (bytes > 0) {
      const ssize_t done = ::write(descriptor_, at, bytes);
      if (done < 0 && errno == EINTR) continue;
      if (done < 0) fail();
      at += done;
      bytes -= static_cast<uint64_t>(done);
    }
  }

  void keep() {
    if (::fsync(descriptor_) != 0) fail();
    if (::rename(aside_.c_str(), path_.c_str()) != 0) fail();
    kept_ = true;
  }

 private:
  [[noreturn]] void fail() const { throw std::runtime_error(path_ + ": " + std::strerror(errno)); }

  std::string path_, aside_;
  int descriptor_ = -1;
  bool kept_ = false;
};

torch::Tensor tensor_of(const json::Value& entry, const char* data, uint64_t data_bytes,
                        uint64_t& covered) {
  using Kind = json::Value::Kind;
  const auto& fields = entry.expect(Kind::object, "a tensor's entry").object;
  for (const char* field : {"dtype", "shape", "data_offsets"})
    if (!fields.contains(field)) throw std::runtime_error(std::string("header: no ") + field);
  const auto& dtype = fields.at("dtype").expect(Kind::string, "dtype").string;
  if (!dtypes.contains(dtype)) throw std::runtime_error("header: dtype " + dtype + " is not known");
  const auto& offsets = fields.at("data_offsets").expect(Kind::array, "data_offsets").array;
  if (offsets.size() != 2) throw std::runtime_error("header: data_offsets is malformed");
  const auto begin = static_cast<uint64_t>(offsets[0].expect(Kind::number, "an offset").number);
  const auto end = static_cast<uint64_t>(offsets[1].expect(Kind::number, "an offset").number);
  if (begin > end || end > data_bytes)
    throw std::runtime_error("truncated: a tensor ends at byte " + std::to_string(end) + " of " +
                             std::to_string(data_bytes));
  const torch::ScalarType type = dtypes.at(dtype);
  uint64_t bytes = c10::elementSize(type);
  std::vector<int64_t> sizes;
  for (const auto& size : fields.at("shape").expect(Kind::array, "shape").array) {
    sizes.push_back(size.expect(Kind::number, "a size").number);
    const auto factor = static_cast<uint64_t>(sizes.back());
    if (factor && bytes > std::numeric_limits<uint64_t>::max() / factor)
      throw std::runtime_error("header: a shape is too large");
    bytes *= factor;
  }
  if (bytes != end - begin) throw std::runtime_error("header: a shape does not fit its bytes");
  covered += bytes;
  torch::Tensor tensor = torch::empty(sizes, type);
  if (bytes) std::memcpy(tensor.data_ptr(), data + begin, bytes);
  return tensor;
}

File parse(const std::string& bytes) {
  uint64_t header_bytes = 0;
  if (bytes.size() < length_bytes) throw std::runtime_error("truncated: no header length");
  for (uint64_t i = 0; i < length_bytes; ++i)
    header_bytes |= static_cast<uint64_t>(static_cast<unsigned char>(bytes[i])) << (8 * i);
  if (header_bytes > bytes.size() - length_bytes)
    throw std::runtime_error("truncated, or not safetensors: a header of " +
                             std::to_string(header_bytes) + " bytes in a file of " +
                             std::to_string(bytes.size()));
  const auto header = json::parse(std::string_view(bytes).substr(length_bytes, header_bytes));
  const char* data = bytes.data() + length_bytes + header_bytes;
  const uint64_t data_bytes = bytes.size() - length_bytes - header_bytes;
  File file;
  uint64_t covered = 0;
  for (const auto& [name, entry] : header.expect(json::Value::Kind::object, "it").object) {
    if (name != "__metadata__") {
      file.tensors[name] = tensor_of(entry, data, data_bytes, covered);
      continue;
    }
    for (const auto& [key, value] : entry.expect(json::Value::Kind::object, "metadata").object)
      file.metadata[key] = value.expect(json::Value::Kind::string, "metadata").string;
  }
  if (covered != data_bytes)
    throw std::runtime_error("tensors cover " + std::to_string(covered) + " bytes of " +
                             std::to_string(data_bytes));
  return file;
}

}  // namespace

void save(const std::string& path, const File& file) {
  File on_cpu{.tensors = {}, .metadata = file.metadata};
  for (const auto& [name, tensor] : file.tensors)
    on_cpu.tensors[name] = tensor.detach().to(torch::kCPU).contiguous();
  const std::string header = header_of(on_cpu);
  const uint64_t header_bytes = header.size();
  unsigned char length[length_bytes];
  for (uint64_t i = 0; i < length_bytes; ++i)
    length[i] = static_cast<unsigned char>(header_bytes >> (8 * i));
  Aside aside(path);
  aside.write(length, length_bytes);
  aside.write(header.data(), header_bytes);
  for (const auto& [name, tensor] : on_cpu.tensors) aside.write(tensor.data_ptr(), tensor.nbytes());
  aside.keep();
}

File load(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw std::runtime_error(path + ": " + std::strerror(errno));
  const std::string bytes{std::istreambuf_iterator<char>(stream), {}};
  try {
    return parse(bytes);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(path + ": not a whole safetensors file: " + error.what());
  }
}

}  // namespace safetensors
