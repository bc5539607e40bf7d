// Trains a GPT on a file's bytes or tokens; examples/python/train_gpt.py gives the same losses.
//
//   train_gpt --text book.txt --steps 100 --checkpoint book.safetensors
#include <cctype>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "redline/layers/gpt.h"
#include "redline/ops/adamw_optimizer.h"
#include "safetensors.h"

namespace {

using torch::Tensor;

constexpr const char* format = "redline.train_gpt";

struct Arguments {
  std::map<std::string, std::string> words = {{"text", ""},
                                              {"tokens", ""},
                                              {"device", "cpu"},
                                              {"checkpoint", ""},
                                              {"learning-rate", "1e-3"}};
  std::map<std::string, int64_t> sizes = {
      {"steps", 100},  {"batch", 4}, {"sequence", 128}, {"vocabulary", 256}, {"layers", 2},
      {"hidden", 128}, {"ffn", 352}, {"heads", 4},      {"kv-heads", 2},     {"seed", 1}};

  int64_t operator[](const char* name) const { return sizes.at(name); }
  const std::string& word(const char* name) const { return words.at(name); }
};

[[noreturn]] void refuse(const std::string& what) { throw std::runtime_error(what); }

int64_t whole_number(const std::string& name, const char* text, int64_t least) {
  char* end = nullptr;
  errno = 0;
  const int64_t value = std::strtoll(text, &end, 10);
  if (errno || !std::isdigit(static_cast<unsigned char>(*text)) || *end || value < least)
    refuse("--" + name + ": expected a whole number of " + std::to_string(least) +
           " or more, not " + text);
  return value;
}

double positive_number(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (end == text.c_str() || *end || !(value > 0 && std::isfinite(value)))
    refuse("--" + name + ": expected a positive number, not " + text);
  return value;
}

void check_device(const std::string& text) {
  const std::string_view index = text.starts_with("cuda:") ? std::string_view(text).substr(5) : "0";
  const bool number = !index.empty() && index.find_first_not_of("0123456789") == index.npos;
  if (text == "cpu") return;
  if (!number || !text.starts_with("cuda") || (text.size() > 4 && text[4] != ':'))
    refuse("--device: expected cpu, cuda or cuda:N, not " + text);
  const auto gpus = static_cast<uint64_t>(torch::cuda::device_count());
  if (std::strtoull(index.data(), nullptr, 10) >= gpus)
    refuse("--device: " + text + ": torch sees " + std::to_string(gpus) + " GPUs here");
}

Arguments parse_arguments(int count, char** values) {
  Arguments arguments;
  for (int i = 1; i < count; i += 2) {
    const std::string flag = values[i];
    const std::string name = flag.starts_with("--") ? flag.substr(2) : "";
    const bool size = arguments.sizes.contains(name);
    if (!size && !arguments.words.contains(name)) refuse(flag + ": no such option");
    if (i + 1 == count) refuse(flag + ": expected a value");
    if (size) {
      const int64_t least = name == "steps" || name == "seed" ? 0 : 1;
      arguments.sizes[name] = whole_number(name, values[i + 1], least);
    } else {
      arguments.words[name] = values[i + 1];
    }
  }
  if (arguments.word("text").empty() == arguments.word("tokens").empty())
    refuse("expected one of --text FILE and --tokens FILE");
  positive_number("learning-rate", arguments.word("learning-rate"));
  check_device(arguments.word("device"));
  return arguments;
}

// Each byte, or each little-endian uint16, as int64.
Tensor read_tokens(const Arguments& arguments) {
  const bool packed = arguments.word("text").empty();
  const std::string path = arguments.word(packed ? "tokens" : "text");
  std::ifstream stream(path, std::ios::binary);
  if (!stream) refuse(path + ": " + std::strerror(errno));
  std::string bytes{std::istreambuf_iterator<char>(stream), {}};
  if (packed && bytes.size() % 2)
    refuse(path + ": expected two bytes per token, not " + std::to_string(bytes.size()) + " bytes");
  const auto count = static_cast<int64_t>(bytes.size() / (packed ? 2 : 1));
  if (count <= arguments["sequence"])
    refuse(path + ": expected more than " + std::to_string(arguments["sequence"]) +
           " tokens (--sequence)");
  const auto dtype = packed ? torch::kUInt16 : torch::kUInt8;
  const Tensor tokens = torch::from_blob(bytes.data(), {count}, dtype).to(torch::kInt64);
  const auto largest = tokens.max().item<int64_t>();
  if (largest >= arguments["vocabulary"])
    refuse(path + ": expected tokens below " + std::to_string(arguments["vocabulary"]) + ", not " +
           std::to_string(largest));
  return tokens;
}

// splitmix64's output function: 64 bits from 64 bits, the same in every language.
uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

struct Batch {
  Tensor inputs, targets;  // [batch, sequence]
};

// Of the step's number and the seed alone.
Batch batch_of(const Tensor& tokens, int64_t step, const Arguments& arguments) {
  const int64_t batch = arguments["batch"], sequence = arguments["sequence"];
  const uint64_t first =
      mix(static_cast<uint64_t>(arguments["seed"])) + static_cast<uint64_t>(step * batch);
  const auto starts = static_cast<uint64_t>(tokens.size(0) - sequence);
  std::vector<Tensor> rows;
  for (int64_t row = 0; row < batch; ++row) {
    const auto start = static_cast<int64_t>(mix(first + static_cast<uint64_t>(row)) % starts);
    rows.push_back(tokens.slice(0, start, start + sequence + 1));
  }
  const Tensor all = torch::stack(rows).to(arguments.word("device"));
  return {.inputs = all.slice(1, 0, sequence).contiguous(),
          .targets = all.slice(1, 1, sequence + 1).contiguous()};
}

std::string shape_of(const Arguments& arguments) {
  std::string shape;
  for (const std::string name : {"vocabulary", "layers", "hidden", "ffn", "heads", "kv-heads"}) {
    std::string word = name;
    std::replace(word.begin(), word.end(), '-', '_');
    shape += (shape.empty() ? "" : " ") + word + '=' + std::to_string(arguments.sizes.at(name));
  }
  return shape;
}

redline::layers::GPT build(const Arguments& arguments) {
  torch::manual_seed(static_cast<uint64_t>(arguments["seed"]));
  redline::layers::GPT model({
      .vocabulary = arguments["vocabulary"],
      .layers = arguments["layers"],
      .layer = {.attention = {.hidden_size = arguments["hidden"],
                              .heads = arguments["heads"],
                              .kv_heads = arguments["kv-heads"],
                              .rotary = {.max_positions = arguments["sequence"]}},
                .mlp = {.ffn_hidden_size = arguments["ffn"]}},
  });
  model->to(torch::Device(arguments.word("device")));
  return model;
}

struct Run {
  Arguments arguments;
  redline::layers::GPT model;
  redline::AdamW optimizer;
  int64_t step = 0;
};

void save_checkpoint(const Run& run) {
  safetensors::File file;
  file.metadata = {
      {"format", format}, {"step", std::to_string(run.step)}, {"shape", shape_of(run.arguments)}};
  for (const auto& named : run.model->named_parameters()) {
    file.tensors["model." + named.key()] = named.value();
    for (const auto& [key, tensor] : run.optimizer.state_of(named.value()))
      file.tensors["optimizer." + named.key() + '.' + key] = tensor;
  }
  safetensors::save(run.arguments.word("checkpoint"), file);
}

void load_checkpoint(Run& run) {
  const std::string path = run.arguments.word("checkpoint");
  safetensors::File file = safetensors::load(path);
  if (file.metadata["format"] != format)
    refuse(path + ": not a checkpoint of train_gpt: its format is " + file.metadata["format"]);
  if (file.metadata["shape"] != shape_of(run.arguments))
    refuse(path + ": expected " + shape_of(run.arguments) + ", not " + file.metadata["shape"]);
  const torch::NoGradGuard no_grad;
  const auto fill = [&](Tensor& into, const std::string& name) {
    const auto found = file.tensors.find(name);
    if (found == file.tensors.end() || found->second.sizes() != into.sizes())
      refuse(path + ": not a checkpoint of this model: " + name +
             " is missing or has another shape");
    into.copy_(found->second);
  };
  for (auto& named : run.model->named_parameters()) {
    fill(named.value(), "model." + named.key());
    for (auto& [key, tensor] : run.optimizer.state_of(named.value()))
      fill(tensor, "optimizer." + named.key() + '.' + key);
  }
  run.step = whole_number("step", file.metadata["step"].c_str(), 0);
}

void train(Run& run, const Tensor& tokens) {
  const std::string& checkpoint = run.arguments.word("checkpoint");
  if (!checkpoint.empty() && std::filesystem::exists(checkpoint)) load_checkpoint(run);
  while (run.step < run.arguments["steps"]) {
    const Batch batch = batch_of(tokens, run.step, run.arguments);
    const Tensor loss = run.model->loss(batch.inputs, batch.targets);
    run.model->zero_grad();
    loss.backward();
    run.optimizer.clip_grad_norm(1.0);
    run.optimizer.step();
    ++run.step;
    std::printf("step %lld loss %.9g\n", static_cast<long long>(run.step), loss.item<double>());
    std::fflush(stdout);
  }
  if (!checkpoint.empty()) save_checkpoint(run);
}

}  // namespace

int main(int count, char** values) {
  try {
    const Arguments arguments = parse_arguments(count, values);
    const Tensor tokens = read_tokens(arguments);
    auto model = build(arguments);
    const double learning_rate = positive_number("learning-rate", arguments.word("learning-rate"));
    redline::AdamW optimizer(model->parameters(),
                             {.learning_rate = learning_rate, .weight_decay = 0.1});
    Run run{.arguments = arguments, .model = model, .optimizer = std::move(optimizer)};
    train(run, tokens);
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "train_gpt: %s\n", error.what_without_backtrace());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "train_gpt: %s\n", error.what());
    return 1;
  }
  return 0;
}
