// Image files as tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

// Returns the pixels of a PNG or JPEG file in RGB: uint8 [3, height, width]. Grey images become RGB;
// transparency and colour profiles are passed over, and an orientation that a camera noted is not applied, as
// timm does it.
//
// Throws std::runtime_error, which names the file and what was wrong with it.
at::Tensor read_image(const std::string& path);

// The same of a file's contents; the error does not name it.
at::Tensor decode_image(const std::vector<unsigned char>& bytes);
