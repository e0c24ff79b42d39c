// What an exported model says of itself, and how images are prepared for it.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <unordered_map>
#include <vector>

// Of a package's metadata, in which `evit export` has written it; docs/export.md lists it.
struct Model {
  std::string name;
  int64_t height;
  int64_t width;
  std::vector<double> mean;
  std::vector<double> std;
  std::string interpolation;
  double crop_pct;
  std::string crop_mode;
  at::ScalarType dtype;
  int64_t max_batch;                 // the most images at once
  std::vector<std::string> classes;  // empty where they have no names
  std::string torch;                 // the version that compiled it

  // Throws std::runtime_error where something is missing, or is nothing that this program can do.
  explicit Model(const std::unordered_map<std::string, std::string>& metadata);

  // Returns the image as the model takes it, in `dtype` [3, height, width]: resized, its centre cut out,
  // normalised, as timm.data.create_transform does it. Before it is normalised, less than one value in fifty
  // differs from timm's, by 1/255 or 2/255: torch and Pillow round resized values to whole numbers in
  // different ways.
  //
  // Throws std::runtime_error where the resized image would be too large for memory.
  //
  // pixels: uint8 [3, any height, any width].
  at::Tensor prepare(const at::Tensor& pixels) const;
};
