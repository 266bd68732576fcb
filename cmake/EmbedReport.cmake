# Makes the files of the report into one source file: cmake -DOUT=... -DSOURCE=... -DUPLOT=... -P EmbedReport.cmake
set(content "// Made by cmake/EmbedReport.cmake from microbatch/run/report and uPlot (MIT licence, Leon Sorokin).\n")
string(APPEND content "#include \"microbatch/run/report_files.h\"\n\nnamespace microbatch::report_files {\n\n")
foreach(file page_html=${SOURCE}/page.html page_css=${SOURCE}/page.css page_js=${SOURCE}/page.js
             uplot_css=${UPLOT}/uPlot.min.css uplot_js=${UPLOT}/uPlot.iife.min.js)
    string(REGEX REPLACE "=.*" "" name ${file})
    string(REGEX REPLACE "^[^=]*=" "" path ${file})
    file(READ ${path} hex HEX)
    # Numbers, not a literal: no content can end it.
    string(REGEX REPLACE "(..)" "0x\\1," bytes ${hex})
    string(REGEX REPLACE "(................................................................................)" "\\1\n" bytes ${bytes})
    string(APPEND content "static const unsigned char ${name}_bytes[] = {\n${bytes}};\n"
                          "const std::string_view ${name}(reinterpret_cast<const char*>(${name}_bytes), sizeof(${name}_bytes));\n\n")
endforeach()
string(APPEND content "}  // namespace microbatch::report_files\n")
file(WRITE ${OUT} "${content}")
