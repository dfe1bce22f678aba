package sysfault

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vhostd/vhostd/internal/require"
)

// program has the binary be the program under test.
const program = "VHOSTD_SYSFAULT_PROGRAM"

func TestMain(m *testing.M) {
	Exec()
	if os.Getenv(program) != "" {
		calls()
		return
	}
	os.Exit(m.Run())
}

// calls syncs two files, five times each, and tells how that went.
func calls() {
	for _, path := range []string{"/dev/null", "/dev/zero"} {
		f, err := os.Open(path)
		if err != nil {
			panic(err)
		}
		for range 5 {
			err := unix.Fsync(int(f.Fd()))
			fmt.Print(errors.Is(err, unix.EIO), " ")
		}
	}
}

// TestInjector: the calls that a rule names fail, in their turn and of the file that it names, and no others.
func TestInjector(t *testing.T) {
	require.Root(t, "root")
	var out bytes.Buffer
	cmd := Command([]int{unix.SYS_FSYNC}, os.Args[0])
	cmd.Env = append(cmd.Env, program+"=1")
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	in, err := Start(cmd, (*exec.Cmd).Start, Rule{Call: unix.SYS_FSYNC, File: "null", Skip: 1, Count: 2, Errno: unix.EIO})
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	const want = "false true true false false false false false false false "
	if out.String() != want || in.Hits() != 2 {
		t.Errorf("%q, %d calls failed; want %q", out.String(), in.Hits(), want)
	}
}
