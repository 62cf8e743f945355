// Of libraries for machines with an older C library than this one's (csrc/build.py --glibc): what newer headers refer to.
#include <new>

// Whether the process has a single thread, of glibc 2.32; 0 is the answer that is always right.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

// Of libstdc++ of GCC 11.
namespace std {
__attribute__((visibility("hidden"))) void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
