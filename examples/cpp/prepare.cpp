#include "prepare.h"

#include <ATen/ops/_upsample_bicubic2d_aa.h>
#include <ATen/ops/_upsample_bilinear2d_aa.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <cmath>
#include <sstream>
#include <stdexcept>

namespace {

using Size = std::pair<int64_t, int64_t>;  // height and width

template <typename T>
std::vector<T> numbers(const std::string& text) {
  std::istringstream stream(text);
  std::vector<T> found;
  for (T number; stream >> number;) found.push_back(number);
  return found;
}

// A row or column in the middle, rounded to even as in Python: where `part` begins in `whole`. Negative where
// the whole is smaller, by the padding that comes before it.
int64_t middle(int64_t whole, int64_t part) {
  return part > whole ? -((part - whole) / 2) : std::llrint((whole - part) / 2.0);
}

// The size of a resized image of which height x width are seen.
Size resized(Size image, int64_t height, int64_t width, double crop_pct, const std::string& crop_mode) {
  const Size target(std::floor(height / crop_pct), std::floor(width / crop_pct));
  if (crop_mode == "squash") return target;
  if (crop_mode == "center" && target.first == target.second) {
    const double size = target.first;
    if (image.first <= image.second) return {size, size * image.second / image.first};
    return {size * image.first / image.second, size};
  }
  const double down = static_cast<double>(image.first) / target.first;
  const double across = static_cast<double>(image.second) / target.second;
  const double ratio = crop_mode == "border" ? std::max(down, across) : std::min(down, across);
  return {std::llrint(image.first / ratio), std::llrint(image.second / ratio)};
}

// What a resized image may have: 200 MB in RGB, or four times what the model sees.
constexpr double kMaxPixels = 1 << 26;

// Throws where an image is so narrow that it would take all memory once its shorter side is as long as the
// model's: 94 bytes of PNG can say 5000 x 1 pixels.
void check(Size image, Size size, int64_t height, int64_t width) {
  const double most = std::max(kMaxPixels, 4.0 * height * width);
  if (static_cast<double>(size.first) * static_cast<double>(size.second) > most)
    throw std::runtime_error("too narrow: its " + std::to_string(image.second) + " x " +
                             std::to_string(image.first) + " pixels would be resized to " +
                             std::to_string(size.second) + " x " + std::to_string(size.first));
}

// image: uint8 [3, any height, any width].
at::Tensor resize(const at::Tensor& image, Size size, const std::string& interpolation) {
  const auto batch = image.unsqueeze(0);
  const int64_t sizes[] = {std::max<int64_t>(1, size.first), std::max<int64_t>(1, size.second)};
  return (interpolation == "bicubic" ? at::_upsample_bicubic2d_aa(batch, sizes, /*align_corners=*/false)
                                     : at::_upsample_bilinear2d_aa(batch, sizes, /*align_corners=*/false))
      .squeeze(0);
}

}  // namespace

Model::Model(const std::unordered_map<std::string, std::string>& metadata) {
  const auto get = [&](const std::string& key) {
    const auto entry = metadata.find("evit." + key);
    if (entry == metadata.end())
      throw std::runtime_error("it has no evit." + key + ": expected a package of evit export --format aoti");
    return entry->second;
  };
  const auto expect = [](bool holds, const std::string& key, const std::string& value, const char* expected) {
    if (!holds) throw std::runtime_error("its " + key + " is " + value + ": expected " + expected);
  };
  name = get("model");
  torch = get("torch");
  const auto input_size = numbers<int64_t>(get("input_size"));
  const auto is_side = [](int64_t side) { return side > 0 && side <= 1 << 16; };
  expect(input_size.size() == 3 && input_size[0] == 3 && is_side(input_size[1]) && is_side(input_size[2]),
         "input_size", get("input_size"), "3, height and width, at most 65536");
  height = input_size[1];
  width = input_size[2];
  mean = numbers<double>(get("mean"));
  std = numbers<double>(get("std"));
  expect(mean.size() == 3, "mean", get("mean"), "3 numbers");
  expect(std.size() == 3, "std", get("std"), "3 numbers");
  interpolation = get("interpolation");
  expect(interpolation == "bicubic" || interpolation == "bilinear", "interpolation", interpolation,
         "bicubic or bilinear");
  const auto shares = numbers<double>(get("crop_pct"));
  expect(shares.size() == 1 && shares[0] >= 0.01 && shares[0] <= 100, "crop_pct", get("crop_pct"),
         "a number from 0.01 to 100");
  crop_pct = shares[0];
  crop_mode = get("crop_mode");
  expect(crop_mode == "center" || crop_mode == "border" || crop_mode == "squash", "crop_mode", crop_mode,
         "center, border or squash");
  const auto dtypes = std::unordered_map<std::string, at::ScalarType>{
      {"float32", at::kFloat}, {"float64", at::kDouble}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}};
  expect(dtypes.count(get("dtype")) == 1, "dtype", get("dtype"), "float32, float64, float16 or bfloat16");
  dtype = dtypes.at(get("dtype"));
  max_batch = INT64_MAX;
  if (metadata.count("evit.max_batch")) {
    const auto most = numbers<int64_t>(get("max_batch"));
    expect(most.size() == 1 && most[0] > 0, "max_batch", get("max_batch"), "a whole number, 1 or more");
    max_batch = most[0];
  }
  if (metadata.count("evit.classes")) {
    std::istringstream lines(get("classes"));
    for (std::string line; std::getline(lines, line);) classes.push_back(line);
  }
}

at::Tensor Model::prepare(const at::Tensor& pixels) const {
  const Size size = resized({pixels.size(1), pixels.size(2)}, height, width, crop_pct, crop_mode);
  check({pixels.size(1), pixels.size(2)}, size, height, width);
  const auto image = resize(pixels, size, interpolation);
  // What lies outside of the image is black, or with "border" the mean.
  auto seen = at::empty({3, height, width}, at::kByte);
  for (int64_t channel = 0; channel < 3; ++channel)
    seen[channel].fill_(crop_mode == "border" ? std::nearbyint(255 * mean[channel]) : 0);
  const int64_t top = middle(image.size(1), height), left = middle(image.size(2), width);
  const int64_t rows = std::min(height, image.size(1)), columns = std::min(width, image.size(2));
  const auto part = [&](const at::Tensor& of, int64_t row, int64_t column) {
    return of.narrow(1, std::max<int64_t>(0, row), rows).narrow(2, std::max<int64_t>(0, column), columns);
  };
  part(seen, -top, -left).copy_(part(image, top, left));
  const auto of_channels = [](const std::vector<double>& values) {
    return at::tensor(values).to(at::kFloat).view({3, 1, 1});
  };
  return seen.to(at::kFloat).div_(255).sub_(of_channels(mean)).div_(of_channels(std)).to(dtype);
}
