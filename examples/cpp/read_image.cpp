#include "read_image.h"

#include <ATen/ops/empty.h>
#include <png.h>

#include <cstdio>  // before jpeglib.h, which needs FILE and does not include it

#include <jpeglib.h>

#include <algorithm>
#include <cerrno>
#include <csetjmp>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

namespace {

// More would be gigabytes of pixels, which no camera makes and a damaged header claims.
#ifdef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
constexpr int64_t kMaxPixels = int64_t{1} << 20;  // as all that is large is slow, too
#else
constexpr int64_t kMaxPixels = int64_t{1} << 28;
#endif

// Of a progressive JPEG, of which a few hundred bytes may go over the whole image once more; usual are ten.
constexpr int kMaxScans = 100;

// Both libraries leave by longjmp on an error, which runs no destructors: what owns memory is made outside of
// the functions that call setjmp.
struct Failure {
  std::jmp_buf back;
  char message[JMSG_LENGTH_MAX] = "";
};

void check_size(int64_t height, int64_t width) {
  if (height > kMaxPixels / width)
    throw std::runtime_error("expected at most " + std::to_string(kMaxPixels) + " pixels, got " +
                             std::to_string(width) + " x " + std::to_string(height));
}

struct Jpeg {
  jpeg_decompress_struct info = {};
  jpeg_error_mgr errors = {};
  jpeg_progress_mgr progress = {};
  Failure failure;

  Jpeg() {
    info.err = jpeg_std_error(&errors);
    info.client_data = &failure;
    errors.error_exit = [](j_common_ptr common) {
      auto* failure = static_cast<Failure*>(common->client_data);
      common->err->format_message(common, failure->message);
      std::longjmp(failure->back, 1);
    };
    // A warning is about damaged data, which would be shown to the model as if it were the image.
    errors.emit_message = [](j_common_ptr common, int level) {
      if (level < 0) common->err->error_exit(common);
    };
  }
  ~Jpeg() { jpeg_destroy_decompress(&info); }
  Jpeg(const Jpeg&) = delete;
  Jpeg& operator=(const Jpeg&) = delete;

  // Reads the header, which says what the rest will take.
  bool start(const std::vector<unsigned char>& bytes) {
    if (setjmp(failure.back)) return false;
    jpeg_create_decompress(&info);
    progress.progress_monitor = [](j_common_ptr common) {
      auto* failure = static_cast<Failure*>(common->client_data);
      if (reinterpret_cast<j_decompress_ptr>(common)->input_scan_number <= kMaxScans) return;
      std::snprintf(failure->message, sizeof failure->message, "expected at most %d scans, got more",
                    kMaxScans);
      std::longjmp(failure->back, 1);
    };
    info.progress = &progress;
    jpeg_mem_src(&info, bytes.data(), bytes.size());
    jpeg_read_header(&info, TRUE);
    if (info.jpeg_color_space == JCS_CMYK || info.jpeg_color_space == JCS_YCCK) {
      std::snprintf(failure.message, sizeof failure.message,
                    "expected an image in grey or colours, got CMYK");
      return false;
    }
    info.out_color_space = JCS_RGB;
    return true;
  }

  // Of a progressive image, this reads all scans into memory.
  bool decompress() {
    if (setjmp(failure.back)) return false;
    return jpeg_start_decompress(&info);
  }

  // To pixels [height, width, 3].
  bool read(unsigned char* pixels) {
    if (setjmp(failure.back)) return false;
    while (info.output_scanline < info.output_height) {
      JSAMPROW row = pixels + size_t{info.output_scanline} * info.output_width * 3;
      jpeg_read_scanlines(&info, &row, 1);
    }
    return jpeg_finish_decompress(&info);
  }
};

at::Tensor decode_jpeg(const std::vector<unsigned char>& bytes) {
  Jpeg jpeg;
  if (!jpeg.start(bytes)) throw std::runtime_error(jpeg.failure.message);
  check_size(jpeg.info.image_height, jpeg.info.image_width);
  if (!jpeg.decompress()) throw std::runtime_error(jpeg.failure.message);
  at::Tensor pixels = at::empty({jpeg.info.output_height, jpeg.info.output_width, 3}, at::kByte);
  if (!jpeg.read(pixels.mutable_data_ptr<unsigned char>())) throw std::runtime_error(jpeg.failure.message);
  return pixels;
}

struct Png {
  Failure failure;
  const std::vector<unsigned char>* bytes;
  size_t position = 0;
  png_structp png;
  png_infop info = nullptr;

  explicit Png(const std::vector<unsigned char>& bytes) : bytes(&bytes) {
    png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &failure, fail, [](png_structp, png_const_charp) {});
    if (png) info = png_create_info_struct(png);
    if (!info) throw std::bad_alloc();
    png_set_read_fn(png, this, [](png_structp png, png_bytep to, size_t count) {
      auto* self = static_cast<Png*>(png_get_io_ptr(png));
      if (count > self->bytes->size() - self->position) png_error(png, "the file ends too early");
      std::memcpy(to, self->bytes->data() + self->position, count);
      self->position += count;
    });
  }
  ~Png() { png_destroy_read_struct(&png, &info, nullptr); }
  Png(const Png&) = delete;
  Png& operator=(const Png&) = delete;

  static void fail(png_structp png, png_const_charp message) {
    auto* failure = static_cast<Failure*>(png_get_error_ptr(png));
    std::snprintf(failure->message, sizeof failure->message, "%s", message);
    std::longjmp(failure->back, 1);
  }

  bool start() {
    if (setjmp(failure.back)) return false;
    png_read_info(png, info);
    png_set_expand(png);
    png_set_strip_16(png);
    png_set_strip_alpha(png);
    png_set_gray_to_rgb(png);
    png_set_interlace_handling(png);
    png_read_update_info(png, info);
    if (png_get_channels(png, info) != 3) png_error(png, "expected an image that can be made RGB");
    return true;
  }

  bool read(png_bytepp rows) {
    if (setjmp(failure.back)) return false;
    png_read_image(png, rows);
    png_read_end(png, nullptr);
    return true;
  }
};

at::Tensor decode_png(const std::vector<unsigned char>& bytes) {
  Png png(bytes);
  if (!png.start()) throw std::runtime_error(png.failure.message);
  const int64_t height = png_get_image_height(png.png, png.info);
  const int64_t width = png_get_image_width(png.png, png.info);
  check_size(height, width);
  at::Tensor pixels = at::empty({height, width, 3}, at::kByte);
  std::vector<png_bytep> rows(height);
  for (int64_t i = 0; i < height; ++i) rows[i] = pixels.mutable_data_ptr<unsigned char>() + i * width * 3;
  if (!png.read(rows.data())) throw std::runtime_error(png.failure.message);
  return pixels;
}

std::vector<unsigned char> read_bytes(const std::string& path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (!file) throw std::runtime_error(std::strerror(errno));
  std::vector<unsigned char> bytes;
  unsigned char part[1 << 16];
  while (const size_t count = std::fread(part, 1, sizeof part, file.get()))
    bytes.insert(bytes.end(), part, part + count);
  if (std::ferror(file.get())) throw std::runtime_error(std::strerror(errno));
  return bytes;
}

}  // namespace

at::Tensor decode_image(const std::vector<unsigned char>& bytes) {
  constexpr unsigned char jpeg[] = {0xff, 0xd8, 0xff}, png[] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n'};
  const auto starts_with = [&](const auto& magic) {
    return bytes.size() >= sizeof magic && std::equal(std::begin(magic), std::end(magic), bytes.begin());
  };
  if (starts_with(jpeg)) return decode_jpeg(bytes).permute({2, 0, 1});
  if (starts_with(png)) return decode_png(bytes).permute({2, 0, 1});
  throw std::runtime_error("expected a PNG or JPEG image");
}

at::Tensor read_image(const std::string& path) {
  try {
    return decode_image(read_bytes(path));
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(path + ": " + error.what());
  }
}
