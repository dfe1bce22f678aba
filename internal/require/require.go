// Package require decides what a test does when the machine lacks something.
//
// A test that needs more than a Go tool chain (root, a tap device, QEMU, a kernel feature) names that need as a
// "part". Where the part is missing, the test is skipped and prints why: a contributor on a laptop sees what was
// not tried. Where the environment says that the part must be there, the same call fails the test instead: in CI
// nothing is left out silently.
//
//	VHOSTD_REQUIRE=vm,tap    these two parts must be there
//	VHOSTD_REQUIRE=all       every part must be there
//
// Parts in use: "root", "tap", "netns", "vm", "uring", "dpdk". A new one needs no registration.
package require

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// Env is the environment variable that lists the parts which must not be skipped.
const Env = "VHOSTD_REQUIRE"

// Required tells whether the environment demands the part.
func Required(part string) bool {
	for p := range strings.SplitSeq(os.Getenv(Env), ",") {
		if p = strings.TrimSpace(p); p == "all" || p == part {
			return true
		}
	}
	return false
}

// Skip ends the test: skipped with the reason, or failed where the part is required. It does not return.
func Skip(t testing.TB, part, format string, args ...any) {
	t.Helper()
	if Required(part) {
		t.Fatalf("%s=%s requires part %q, but "+format, append([]any{Env, os.Getenv(Env), part}, args...)...)
	}
	t.Skipf("part %q skipped: "+format, append([]any{part}, args...)...)
}

// Root skips the test unless it runs with effective user id 0.
func Root(t testing.TB, part string) {
	t.Helper()
	if uid := os.Geteuid(); uid != 0 {
		Skip(t, part, "root is needed and the effective user id is %d", uid)
	}
}

// Tool skips the test unless the program is found, and returns its path. The directories that hold system tools
// are searched beside $PATH, since a user's $PATH often lacks them.
func Tool(t testing.TB, part, name string) string {
	t.Helper()
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		if path, err := exec.LookPath(dir + "/" + name); err == nil {
			return path
		}
	}
	Skip(t, part, "the program %q is not installed (scripts/setup.sh installs it)", name)
	return ""
}

// File skips the test unless the path exists and can be opened in the given mode (os.O_RDONLY, os.O_RDWR).
func File(t testing.TB, part, path string, flag int) {
	t.Helper()
	f, err := os.OpenFile(path, flag, 0)
	if err != nil {
		Skip(t, part, "%v", err)
	}
	f.Close()
}

// NotShort skips the test in `go test -short`, whatever is required: the caller asked for less.
func NotShort(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("skipped: -short")
	}
}
