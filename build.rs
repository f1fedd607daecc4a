//! Gives the shared library its SONAME: programs keep running with every library of the same ABI.

fn main() {
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libvmbed.so.0");
    println!("cargo::rerun-if-changed=build.rs");
}
