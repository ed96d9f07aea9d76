// A string that an op was called with. PyTorch's own conversion to std::string never frees it.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <string_view>

namespace attn {

class Text {
 public:
  explicit Text(StringHandle handle) : handle_(handle) {
    size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle_, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle_, &data));
    view_ = {data, length};
  }
  Text(const Text&) = delete;
  Text& operator=(const Text&) = delete;
  ~Text() { torch_delete_string(handle_); }
  std::string_view view() const { return view_; }

 private:
  StringHandle handle_;
  std::string_view view_;
};

}  // namespace attn
