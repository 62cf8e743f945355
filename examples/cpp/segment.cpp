// Label map of a picture without Python: segment MODEL.pt2 PICTURE.ppm LABELS.pgm
// MODEL.pt2 is what `segvit export` wrote. How to build and run this: README.md beside it.
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <caffe2/serialize/inline_container.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <unistd.h>

#include <fstream>
#include <iostream>

// The operators are in the file too. They come first: a program looks them up when it is loaded.
void load_operators(const std::string& model) {
  auto [content, size] = caffe2::serialize::PyTorchStreamReader(model).getRecord("segvit/libsegvit_native.so");
  char path[] = "/tmp/segvit-XXXXXX";
  const int file = mkstemp(path);
  const bool written = file >= 0 && write(file, content.get(), size) == static_cast<ssize_t>(size);
  close(file);
  void* library = written ? dlopen(path, RTLD_NOW | RTLD_GLOBAL) : nullptr;
  unlink(path);
  if (!library) throw std::runtime_error(written ? dlerror() : "/tmp: cannot be written");
}

at::Tensor read_ppm(const std::string& path) {  // (height, width, 3), uint8
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be opened");
  const auto word = [&] {  // the next one of the header; a comment runs to the end of its line
    for (; (file >> std::ws).peek() == '#'; file.ignore(1 << 20, '\n')) {}
    std::string text;
    file >> text;
    return text;
  };
  const std::string kind = word(), width = word(), height = word(), most = word();
  if (kind != "P6" || most != "255") throw std::runtime_error(path + ": expected a binary PPM (P6) of 8 bits");
  const long w = std::atol(width.c_str()), h = std::atol(height.c_str());
  if (std::min(w, h) < 1 || std::max(w, h) > 1 << 15) throw std::runtime_error(path + ": no usable size");
  at::Tensor pixels = at::empty({h, w, 3}, at::kByte);
  file.get();  // the blank behind the header
  if (!file.read(static_cast<char*>(pixels.data_ptr()), pixels.numel())) throw std::runtime_error(path + ": too short");
  return pixels;
}

void segment(const std::string& model, const std::string& picture, const std::string& result) {
  load_operators(model);
  torch::inductor::AOTIModelPackageLoader program(model);
  auto needs = program.get_metadata();
  if (needs["batch"] != "1") throw std::runtime_error(model + ": takes " + needs["batch"] + " pictures at once");
  at::Tensor pixels = read_ppm(picture);
  const std::string size = std::to_string(pixels.size(1)) + "x" + std::to_string(pixels.size(0));
  const std::string wanted = needs["width"] + "x" + needs["height"];
  if (size != wanted) throw std::runtime_error(picture + ": is " + size + " pixels, expected " + wanted);
  if (needs["layout"] == "nchw") pixels = pixels.permute({2, 0, 1}).contiguous();
  at::Tensor labels = program.run({pixels.unsqueeze(0).to(needs["device"])})[0].cpu();  // (1, height, width)
  const bool wide = labels.scalar_type() != at::kByte;  // more than 256 classes: 16 bits, the high byte first
  if (wide) labels = at::stack({labels.bitwise_right_shift(8), labels.bitwise_and(255)}, -1).to(at::kByte);
  std::ofstream file(result, std::ios::binary);
  file << "P5\n" << needs["width"] << " " << needs["height"] << "\n" << (wide ? 65535 : 255) << "\n";
  file.write(static_cast<const char*>(labels.contiguous().data_ptr()), labels.numel());
  if (!file.flush()) throw std::runtime_error(result + ": cannot be written");
}

int main(int count, char** words) try {
  if (count != 4) throw std::runtime_error("usage: segment MODEL.pt2 PICTURE.ppm LABELS.pgm");
  segment(words[1], words[2], words[3]);
} catch (const std::exception& error) {
  const std::string text = error.what();
  std::cerr << text.substr(0, text.find('\n')) << std::endl;  // PyTorch adds where it was thrown
  return 2;
}
