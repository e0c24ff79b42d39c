// Classifies images with a model that `evit export --format aoti` has compiled, without Python.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/topk.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/version.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "prepare.h"
#include "read_image.h"

namespace {

constexpr const char* kUsage =
    "usage: classify [--top K] [--batch B] [--device N] PACKAGE IMAGE...\n"
    "\n"
    "Classify images, PNG or JPEG, with a model that `evit export --format aoti` has compiled.\n"
    "\n"
    "  --top K      print the K most probable classes of an image (default: 5)\n"
    "  --batch B    show the model at most B images at once (default: 16)\n"
    "  --device N   the GPU, by its number, of a model that was compiled for one (default: 0)\n";

struct Options {
  int64_t top = 5;
  int64_t batch = 16;
  std::optional<int64_t> device;
  std::vector<std::string> files;  // the package, then images
};

int64_t number(const std::string& option, const char* text, int64_t least) {
  size_t end = 0;
  int64_t value = -1;
  try {
    value = text ? std::stoll(text, &end) : -1;
  } catch (const std::logic_error&) {
  }
  if (!text || end != std::strlen(text) || value < least)
    throw std::runtime_error(option + ": expected a whole number, " + std::to_string(least) +
                             " or more, got " + (text ? text : "none"));
  return value;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto value = [&](int64_t least) { return number(argument, ++i < argc ? argv[i] : nullptr, least); };
    if (argument == "--top") {
      options.top = value(1);
    } else if (argument == "--batch") {
      options.batch = value(1);
    } else if (argument == "--device") {
      options.device = value(0);
    } else if (argument.size() > 1 && argument[0] == '-') {
      throw std::runtime_error("unknown option " + argument + "; --help lists them");
    } else {
      options.files.push_back(argument);
    }
  }
  if (options.files.size() < 2) throw std::runtime_error("expected PACKAGE IMAGE...; --help says more");
  return options;
}

using Loader = torch::inductor::AOTIModelPackageLoader;
using Metadata = std::unordered_map<std::string, std::string>;

// The first line of a message, without the stack that torch's errors carry.
std::string reason(const std::exception& error) {
  const auto* of_torch = dynamic_cast<const c10::Error*>(&error);
  const std::string text = of_torch ? of_torch->what_without_backtrace() : error.what();
  return text.substr(0, text.find('\n'));
}

// Read without loading the compiled code, which may be for another device.
Metadata read_metadata(const std::string& package) {
  if (!std::filesystem::is_regular_file(package)) throw std::runtime_error("there is no file " + package);
  try {
    return Loader::load_metadata_from_package(package, "model");
  } catch (const std::exception& error) {
    throw std::runtime_error(package + " is no AOTInductor package: " + reason(error));
  }
}

Model read_model(const std::string& package, const Metadata& metadata) {
  try {
    const Model model(metadata);
    // The compiled code calls functions of torch that may have changed since.
    const auto number = [](const std::string& version) { return version.substr(0, version.find('+')); };
    if (number(model.torch) != number(TORCH_VERSION))
      std::fprintf(stderr, "classify: warning: %s was compiled by torch %s, this is %s\n", package.c_str(),
                   model.torch.c_str(), TORCH_VERSION);
    return model;
  } catch (const std::exception& error) {
    throw std::runtime_error(package + " cannot be used: " + reason(error));
  }
}

// Where a package runs: on the kind of device that it was compiled for, of which AOTInductor notes the name.
at::Device device_of(const std::string& package, const Metadata& metadata, std::optional<int64_t> number) {
  const at::Device device(metadata.at("AOTI_DEVICE_KEY"));
  if (device.is_cpu()) {
    if (number) throw std::runtime_error("--device is for a GPU: " + package + " was compiled for the CPU");
    return device;
  }
  if (number.value_or(0) > std::numeric_limits<c10::DeviceIndex>::max())
    throw std::runtime_error("--device: there is no GPU " + std::to_string(*number));
  return {device.type(), static_cast<c10::DeviceIndex>(number.value_or(0))};
}

Loader load(const std::string& package, at::Device device) {
  try {
    return Loader(package, "model", /*run_single_threaded=*/false, /*num_runners=*/1, device.index());
  } catch (const std::exception& error) {
    throw std::runtime_error(package + " cannot be loaded: " + reason(error));
  }
}

// Returns an image as the model takes it, [3, height, width].
at::Tensor prepared(const std::string& file, const Model& model) {
  const at::Tensor pixels = read_image(file);
  try {
    return model.prepare(pixels);
  } catch (const std::exception& error) {
    throw std::runtime_error(file + ": " + reason(error));
  }
}

// images: [B, 3, height, width]; returns logits, float64 [B, classes].
at::Tensor run(Loader& loader, const at::Tensor& images) {
  const std::vector<at::Tensor> outputs = loader.run({images});
  return outputs.at(0).to(at::kCPU, at::kDouble);
}

// logits: float64 [classes] of one image.
void print(const std::string& file, const at::Tensor& logits, const Model& model, int64_t top) {
  const auto probabilities = logits.softmax(0);
  const auto [values, places] = at::topk(probabilities, std::min(top, probabilities.size(0)));
  std::printf("%s\n", file.c_str());
  for (int64_t i = 0; i < values.size(0); ++i) {
    const auto place = places[i].item<int64_t>();
    const bool named = place < static_cast<int64_t>(model.classes.size());
    std::printf("  %.4f  %s\n", values[i].item<double>(),
                named ? model.classes[place].c_str() : ("class " + std::to_string(place)).c_str());
  }
}

void classify(const Options& options) {
  const c10::InferenceMode inference;
  const std::string& package = options.files[0];
  const Metadata metadata = read_metadata(package);
  const Model model = read_model(package, metadata);
  const at::Device device = device_of(package, metadata, options.device);
  Loader loader = load(package, device);

  const size_t batch = std::min(options.batch, model.max_batch);
  for (size_t first = 1; first < options.files.size(); first += batch) {
    const size_t end = std::min(options.files.size(), first + batch);
    std::vector<at::Tensor> images;
    for (size_t i = first; i < end; ++i) images.push_back(prepared(options.files[i], model));
    const at::Tensor logits = run(loader, at::stack(images).to(device));
    for (size_t i = first; i < end; ++i) print(options.files[i], logits[i - first], model, options.top);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (std::any_of(argv + 1, argv + argc, [](const char* argument) {
        return !std::strcmp(argument, "--help") || !std::strcmp(argument, "-h");
      })) {
    std::fputs(kUsage, stdout);
    return 0;
  }
  try {
    classify(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "classify: error: %s\n", reason(error).c_str());
    return 2;
  }
  return 0;
}
