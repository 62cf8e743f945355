// Included before everything, so that the library asks for less of the libstdc++ where it is loaded: templates that newer
// ones hold compiled (std::ostringstream of GCC 11) are compiled here.
#pragma once
#include <version>
#ifdef _GLIBCXX_EXTERN_TEMPLATE
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 0
#endif
