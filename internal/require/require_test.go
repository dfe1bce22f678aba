package require

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
)

// recorder stands in for the test that calls Skip; only what Skip uses is implemented.
type recorder struct {
	testing.TB
	skipped, failed string
}

func (r *recorder) Helper() {}

func (r *recorder) Fatalf(format string, args ...any) {
	r.failed = fmt.Sprintf(format, args...)
	runtime.Goexit()
}

func (r *recorder) Skipf(format string, args ...any) {
	r.skipped = fmt.Sprintf(format, args...)
	runtime.Goexit()
}

func record(f func(t testing.TB)) *recorder {
	r := &recorder{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		f(r)
	}()
	<-done
	return r
}

func TestSkip(t *testing.T) {
	for _, tt := range []struct {
		env    string
		failed bool
	}{
		{"", false}, {"vm", false}, {"tapx,vm", false},
		{"tap", true}, {"vm,tap", true}, {"vm, tap", true}, {"all", true},
	} {
		t.Run(tt.env, func(t *testing.T) {
			t.Setenv(Env, tt.env)
			r := record(func(t testing.TB) { Skip(t, "tap", "no %s", "/dev/net/tun") })
			got, other := r.skipped, r.failed
			if tt.failed {
				got, other = other, got
			}
			if !strings.HasSuffix(got, "no /dev/net/tun") || other != "" {
				t.Errorf("skipped %q, failed %q, want failed: %v", r.skipped, r.failed, tt.failed)
			}
		})
	}
}

func TestTool(t *testing.T) {
	t.Setenv(Env, "")
	if r := record(func(t testing.TB) { Tool(t, "vm", "no-such-program") }); !strings.Contains(r.skipped, "no-such-program") {
		t.Errorf("skipped %q, want the program's name in it", r.skipped)
	}
	if path := Tool(t, "sh", "sh"); !strings.HasSuffix(path, "/sh") {
		t.Errorf("Tool(sh) = %q", path)
	}
}

func TestFile(t *testing.T) {
	t.Setenv(Env, "")
	if r := record(func(t testing.TB) { File(t, "tap", "/no/such/file", 0) }); !strings.Contains(r.skipped, "/no/such/file") {
		t.Errorf("skipped %q, want the path in it", r.skipped)
	}
	if r := record(func(t testing.TB) { File(t, "tap", "/dev/null", 0) }); r.skipped+r.failed != "" {
		t.Errorf("skipped %q, failed %q for /dev/null", r.skipped, r.failed)
	}
}
