package debian

import "testing"

func TestParseMirror(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, targets, want string }{
		{"first of Debian's own", "Translations Debian Debian http://one.test/debian/\nPackages Debian Debian http://two.test/debian/\n", "http://two.test/debian/"},
		{"security is another archive", "Packages Debian Debian-Security http://one.test/security/\nPackages Debian Debian http://two.test/debian/\n", "http://two.test/debian/"},
		{"other vendors", "Packages Other Other http://one.test/\n", ""},
		{"none", "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			got, err := parseMirror(test.targets)
			if got != test.want || (err == nil) != (test.want != "") {
				t.Errorf("got %q, %v; want %q", got, err, test.want)
			}
		})
	}
}
