# Sets UPLOT_DIST, the folder with uPlot.iife.min.js and uPlot.min.css for report.html: of node_modules, where `make build`
# puts it, or MICROBATCH_UPLOT.
set(UPLOT_DIST $ENV{MICROBATCH_UPLOT})
if(NOT UPLOT_DIST)
    set(UPLOT_DIST ${PROJECT_SOURCE_DIR}/node_modules/uplot/dist)
endif()
if(NOT EXISTS ${UPLOT_DIST}/uPlot.iife.min.js OR NOT EXISTS ${UPLOT_DIST}/uPlot.min.css)
    message(FATAL_ERROR "uPlot is not in ${UPLOT_DIST}: run scripts/setup.sh build (or npm ci), or name the folder of its "
                        "dist files with MICROBATCH_UPLOT")
endif()
