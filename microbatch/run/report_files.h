#pragma once

#include <string_view>

/// The parts of report.html, embedded when the library is built.
namespace microbatch::report_files {

extern const std::string_view page_html, page_css, page_js, uplot_css, uplot_js;

}  // namespace microbatch::report_files
