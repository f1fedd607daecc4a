# shellcheck shell=bash disable=SC2034 # the names are for the scripts that source this file
# What the scripts in tests/lab and tests/assets share. Source it; it runs nothing.
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin # modprobe, mkfs.ext4: not in every user's PATH
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
target=$(realpath -m -- "${CARGO_TARGET_DIR:-$repo/target}")
lab=$target/lab
assets=$lab/assets

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$@"; exit 1; }

# need PROGRAM=PACKAGE... : installs the packages whose programs are missing.
need() {
	local pair missing=()
	for pair; do
		command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
	done
	((${#missing[@]})) || return 0
	say "installing ${missing[*]} (apt-get)"
	local sudo=()
	[[ $(id -u) == 0 ]] || sudo=(sudo)
	local install=("${sudo[@]}" env DEBIAN_FRONTEND=noninteractive
		apt-get -q -y -o DPkg::Lock::Timeout=300 install --no-install-recommends "${missing[@]}")
	# The lists are fetched only if the ones at hand (none on a fresh machine, or stale) do not do.
	"${install[@]}" >&2 || { "${sudo[@]}" apt-get -q update >&2 && "${install[@]}" >&2; } ||
		die "apt-get cannot install: ${missing[*]}"
}

# lock NAME : one process at a time does what follows; others wait (at most 20 minutes).
lock() {
	mkdir -p "$lab"
	local fd
	exec {fd}>"$lab/.lock-$1"
	flock -n "$fd" && return
	say "waiting for another process that makes $1"
	flock -w 1200 "$fd" || die "$1 is still being made by another process after 20 minutes"
}

# debian_sources : Debian 12's package sources, on the mirrors that this machine's apt already uses.
debian_sources() {
	local here main security options='[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg target=Packages]'
	here=$(. /etc/os-release && echo "$VERSION_CODENAME")
	main=$(mirror "$here" stable)
	security=$(mirror "$here-security" stable-security)
	[[ $main ]] || die "apt on this machine has no source of Debian's main: see apt-get indextargets"
	printf "deb $options $main %s main\n" bookworm bookworm-updates bookworm-backports
	[[ ! $security ]] || printf '%s\n' "deb $options $security bookworm-security main"
}

# mirror SUITE... : where this machine's apt gets the first of these suites that it has.
mirror() {
	# The variables in the format are apt's. Lists need not have been fetched for this.
	# shellcheck disable=SC2016
	apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
		awk -v suites=" $* " '$2 == "main" && index(suites, " " $1 " ") && !found++ { print $3 }'
}

# modules KERNELDIR NAME... : the modules' files with all they depend on, in the order in which to insert them.
# Of a name that this kernel does not have as a module (built in, or absent) it prints nothing.
modules() {
	local dir=$1 name
	shift
	for name; do
		# -C: this machine's blacklists and options are not the guest's.
		modprobe -C /dev/null -d "$dir" -S "$(release "$dir")" --show-depends "$name" 2>/dev/null || true
	done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }'
}

# release KERNELDIR : what uname -r says under that kernel.
release() { basename "$1"/lib/modules/*; }

# put_modules KERNELDIR ROOT NAME... : copies modules() into ROOT/modules, numbered in order and decompressed (the
# guest's insmod reads plain ELF only).
put_modules() {
	local dir=$1 root=$2 file base n=100
	shift 2
	mkdir -p "$root/modules"
	while read -r file; do
		base=$((n++))-$(basename "$file")
		case $file in
		*.xz) xz -dc "$file" >"$root/modules/${base%.xz}" ;;
		*.zst) zstd -qdc "$file" >"$root/modules/${base%.zst}" ;;
		*) cp -L "$file" "$root/modules/$base" ;;
		esac
	done < <(modules "$dir" "$@")
}

# put_busybox ROOT : busybox with a link for each applet, so that no guest spends its time on --install.
put_busybox() {
	local applet
	mkdir -p "$1/bin" "$1/proc" "$1/sys" "$1/dev" "$1/run" "$1/tmp"
	cp "$(type -P busybox)" "$1/bin/busybox"
	for applet in $("$1/bin/busybox" --list); do
		[[ -e $1/bin/$applet ]] || ln -s busybox "$1/bin/$applet"
	done
}

# pack ROOT OUT : an uncompressed newc archive (a guest reads it fastest), the same bytes for the same files.
pack() {
	find "$1" -exec touch -h -d @0 {} +
	(cd "$1" && find . -mindepth 1 | LC_ALL=C sort | cpio -o -H newc -R 0:0 --reproducible --quiet) >"$2.part$$"
	mv "$2.part$$" "$2"
}
