// Runs an AOTInductor package with ops of attn_ops in a process that holds no Python.
//
// run FOLDER, where export.py has written the package; see README.md. The ops live in shared
// libraries: opening them registers the ops with PyTorch's dispatcher, where the package looks.

#include <dlfcn.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

namespace {

std::vector<char> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "run: cannot read ", path, "; export.py writes it");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// A name in every line.
void open_libraries(const std::string& file) {
  const std::vector<char> text = read(file);
  std::istringstream lines({text.begin(), text.end()});
  for (std::string name; std::getline(lines, name);) {
    TORCH_CHECK(dlopen(name.c_str(), RTLD_NOW | RTLD_GLOBAL) != nullptr, "run: ", dlerror());
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: run FOLDER\n";
    return 2;
  }
  const std::string folder = argv[1];
  open_libraries(folder + "/libraries.txt");

  c10::InferenceMode mode;
  torch::inductor::AOTIModelPackageLoader model(folder + "/model.pt2");
  const c10::List<c10::IValue> cases = torch::jit::pickle_load(read(folder + "/cases.pt")).toList();
  const size_t count = cases.size() / 2;
  bool agree = true;
  for (size_t i = 0; i < count; ++i) {
    const at::Tensor input = cases.get(i).toTensor();
    const at::Tensor expected = cases.get(count + i).toTensor();
    const at::Tensor actual = model.run({input}).at(0);
    const double error = (actual - expected).abs().max().item<double>();
    agree = agree && at::allclose(actual, expected, 1e-4, 1e-5);
    std::cout << "batch " << input.size(0) << ", length " << input.size(1)
              << ": largest difference " << error << "\n";
  }
  TORCH_CHECK(dlsym(RTLD_DEFAULT, "Py_Initialize") == nullptr, "run: there is Python in here");
  std::cout << (agree ? "as in Python, without Python" : "NOT as in Python") << "\n";
  return agree ? 0 : 1;
}
